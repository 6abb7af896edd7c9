"""How many ads, documents, publishers ... a set of N displays has."""

from dataclasses import dataclass

from widedeep.errors import InputError

FULL_DISPLAYS = 16_874_593
RULE = (
    "counts of the published data set times (displays / 16,874,593)^0.8 for ads, campaigns, documents and entities, "
    "and ^0.5 for advertisers, sources and publishers; categories, topics and geo strings are always all there"
)
CATEGORIES = 97
TOPICS = 300

# Distinct values seen in the published files. Of a heavy-tailed pool some values are never drawn, so the two pools of
# documents are larger than the distinct counts that they leave in the files (894,060 pages, 185,709 landing pages).
_CATALOGUE = {"ads": 559_583, "campaigns": 34_675, "documents": 2_999_334, "event_documents": 1_200_000}
_CATALOGUE |= {"promoted_documents": 240_000, "entities": 1_326_009}
_SITES = {"advertisers": 4_385, "sources": 14_394, "publishers": 1_259}
_SMALLEST = {"ads": 200, "campaigns": 20, "documents": 600, "event_documents": 200, "promoted_documents": 100}
_SMALLEST |= {"entities": 6_000, "advertisers": 10, "sources": 20, "publishers": 8}


@dataclass(frozen=True)
class Sizes:
    """Numbers of distinct things; `displays` have known clicks, `test_displays` appear in events.csv only."""

    displays: int
    test_displays: int
    users: int
    ads: int
    campaigns: int
    documents: int
    event_documents: int
    promoted_documents: int
    entities: int
    advertisers: int
    sources: int
    publishers: int

    @classmethod
    def scaled(cls, displays: int) -> "Sizes":
        """Sublinear, so a small set has clicks on most ads: 60 rows an ad at 150,000 displays, 156 at full size."""
        if displays < 1:
            raise InputError(f"--displays is {displays}, expected at least 1")
        ratio = displays / FULL_DISPLAYS
        counts = {name: round(full * ratio**0.8) for name, full in _CATALOGUE.items()}
        counts |= {name: round(full * ratio**0.5) for name, full in _SITES.items()}
        counts = {name: max(count, _SMALLEST[name]) for name, count in counts.items()}
        test = round(displays * 6_245_533 / FULL_DISPLAYS)
        # Drawing evenly from three times as many users as events leaves the published 0.856 distinct users per event.
        return cls(displays=displays, test_displays=test, users=3 * (displays + test), **counts)
