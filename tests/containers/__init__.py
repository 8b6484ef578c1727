"""Images and services without a container engine: their commands, one by one, each on a file system of its own.

What stands for the base image is this machine, seen through an overlay: what a command writes stays in the overlay, the
checkout and the homes of this machine are hidden, and commands run as the user that the image names. Only root may mount.
"""
