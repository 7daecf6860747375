"""The network of the paper's experiment 5.2: a convolutional variational autoencoder of MNIST."""
