"""A small trained model with latent attention, and the whole run on it."""
