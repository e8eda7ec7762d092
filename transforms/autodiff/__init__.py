"""Derivatives.

grad       differentiable, grad, value_and_grad, vjp, jvp, linearize, jacfwd, jacrev, hessian, plan
halves     halves: the forward and the backward Graph of a gradient, and the residuals between them
jacobians  jacfwd, jacrev and hessian, some rows or columns at a time
messages   error messages of derivatives
"""
