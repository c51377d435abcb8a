"""Tars of captioned pictures: walked, indexed, opened as collections."""
