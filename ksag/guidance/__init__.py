"""The mathematics of guidance: directions, rules for classifier-free guidance, and the state of a run."""
