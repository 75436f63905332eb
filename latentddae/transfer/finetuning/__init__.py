"""Training a pretrained trunk on."""
