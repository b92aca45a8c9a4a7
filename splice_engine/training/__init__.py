"""The paper: losses, generator, and the runs that optimise them."""
