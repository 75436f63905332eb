"""Images -> autoencoder moments: restartable, rank-parallel."""
