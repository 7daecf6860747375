"""The comparison: one network, one seed, several arms side by side, and what the evidence is.

arms      what is compared
run       one training run
loop      all runs, advancing together
evidence  what the curves prove
results   everything measured, as JSON
report    the same for people: a table, curves, a page
"""
