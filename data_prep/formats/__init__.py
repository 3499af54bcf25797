"""Readers of other tools' labels, one file a format, and the way from them to COCO's records."""
