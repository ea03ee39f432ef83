"""Training: `fit.fit` is the loop of every network, `launch.launch` the command line of scripts."""
