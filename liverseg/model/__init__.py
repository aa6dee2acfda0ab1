"""The networks and the losses they learn from."""
