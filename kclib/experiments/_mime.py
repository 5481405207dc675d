"""MIME types of what notebooks leave for reports."""

HEADLINE = "application/vnd.kclib.headline+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
