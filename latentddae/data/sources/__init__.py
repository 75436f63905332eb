"""Every layout of images becomes one Source."""
