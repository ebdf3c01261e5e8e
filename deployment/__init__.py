"""Puts vecmill, and vLLM beside it, under systemd on this machine.

Runs before anything is installed: it knows the standard library only, and nothing of vecmill's code. What is to be
done is worked out first, from what the machine says, as a list of steps; printing that list and carrying it out are the
two things that can be done with it.
"""
