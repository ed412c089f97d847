"""One `Report` value, and the faces it has: JSON, HTML, Markdown, JUnit, model card."""
