"""Continual-learning methods: state and the order of calls; the arithmetic is in fastcl.ops."""
