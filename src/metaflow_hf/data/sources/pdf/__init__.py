"""The text of a PDF as people read it: paragraphs instead of lines, without what repeats on every page.

Read in this order: ``geometry`` (words and rows with their places), ``extraction`` (PDFium gives them), ``columns``
(reading order), ``furniture`` (running heads, feet and page numbers), ``blocks`` (rows become paragraphs, lists, tables
and code), ``hyphens`` (which hyphen at a line end belongs to its word), ``text`` (blocks become text).
"""
