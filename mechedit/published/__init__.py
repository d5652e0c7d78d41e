"""What the papers and their code say: the numbers of their tables (`tables/`), and the settings they edit with.

One place for both, which tables, figures and pages read. Nothing here was measured by mechedit.
"""

from mechedit.published.settings import (
    PublishedRange,
    PublishedSettings,
    Shape,
    canonical,
    published_ranges,
    published_settings,
)
from mechedit.published.tables import SCORES, published_scores, published_table

__all__ = [
    "SCORES",
    "PublishedRange",
    "PublishedSettings",
    "Shape",
    "canonical",
    "published_ranges",
    "published_scores",
    "published_settings",
    "published_table",
]
