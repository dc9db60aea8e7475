"""The lab: what recorded the book's results and compares approaches on your own data. To be run more than read.

The other modules of `helpers` and chapters 00 to 05 import nothing from here.
"""
