"""Experiments on the method itself: what a choice does to the accuracy, not to the speed."""
