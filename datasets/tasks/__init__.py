"""Environments that no package has, one file each; datasets/catalog.py makes tasks of them, gridworlds aside."""
