"""The spectrum of feature maps at each convolution, and how many dimensions of its channels a network uses."""
