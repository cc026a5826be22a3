"""The verb `bench`: what Operations and training steps cost, of programs that were just seen to compute the same thing."""
