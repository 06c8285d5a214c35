"""The operators that torch.compile sees whole, their launches, and the choice between kernels and torch path.

`labels` serves class indices, `shares` targets that are shares of classes, `elementwise` the sigmoid
family.
"""
