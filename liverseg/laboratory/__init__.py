"""Which loss and which settings learn: experiments on one case."""
