"""Gradient rules: how the gradients of several tasks become one step of the parameters that the tasks share."""
