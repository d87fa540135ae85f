"""Figures, tables and the self-contained HTML report, made from what runs left in their folders."""
