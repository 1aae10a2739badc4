"""Checkpoints: safe reading, whole writing, the plain student, the identity of a teacher."""
