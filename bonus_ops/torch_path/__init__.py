"""The fast torch path, where Triton cannot run: blocks of rows that stay in cache, a few passes each.

`labels` serves class indices, `shares` targets that are shares of classes, `elementwise` the sigmoid
family.
"""
