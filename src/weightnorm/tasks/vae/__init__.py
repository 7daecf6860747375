"""The convolutional variational autoencoders of section 5.2."""
