"""Expectation maximisation: exact E-steps by enumeration, M-steps in closed form or by L-BFGS."""
