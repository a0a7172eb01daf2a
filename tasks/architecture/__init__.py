"""Search for the cells of a convolutional network, and the networks made of them."""
