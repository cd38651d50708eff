"""The streamed model: transformers' layers with few weights in memory at a time, forward and backward.

Hooks and observers that watch a layer while it runs stand here too.
"""
