"""`ghostvis bench train`: training speed of our layouts beside peers, in the same run."""
