"""Derivatives of every order: what the operators give, and the formulas where they do not.

`labels` serves class indices, `shares` targets that are shares of classes, `elementwise` the sigmoid
family.
"""
