"""One spelling of letters: what search and the grading of text answers both take for the same letter."""

LATIN = dict(zip("øłđıæœðþħ", ("o", "l", "d", "i", "ae", "oe", "d", "th", "h"), strict=True))
"""Small Latin letters that Unicode does not decompose, in the plain letters that are written for them."""
