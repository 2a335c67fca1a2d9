"""The common part of the pages that people read: template, style, units, charts."""
