"""The raw files: names, columns, and the constants of the data set."""

from preprocess.csv_io import Column

MILLISECONDS_A_DAY = 24 * 60 * 60 * 1000
ORIGIN_MS = 1465876799998  # Unix time of timestamp 0 of events.csv
LAST_SHARED_DAY = 10  # displays up to this day are split by hash, later ones are all for the test set
TEST_FRACTION = 0.2
MAX_AGE_DAYS = 3650  # a page older than ten years, or from the future, counts as published today
MAX_TIMESTAMP = 2**53

CLICKS = (Column("display_id"), Column("ad_id"), Column("clicked", high=1))
EVENTS = (
    Column("display_id"),
    Column("document_id", nullable=True),
    Column("timestamp", nullable=True, high=MAX_TIMESTAMP),
    Column("platform", nullable=True, low=1, high=4),
    Column("geo_location", "string", nullable=True),
)
PROMOTED = (
    Column("ad_id"),
    Column("document_id", nullable=True),
    Column("campaign_id", nullable=True),
    Column("advertiser_id", nullable=True),
)
META = (
    Column("document_id"),
    Column("source_id", nullable=True),
    Column("publisher_id", nullable=True),
    Column("publish_time", "time", nullable=True),
)
_CONFIDENCE = Column("confidence_level", "float", high=1e30)
ATTRIBUTES = {
    "categories": (Column("document_id"), Column("category_id"), _CONFIDENCE),
    "topics": (Column("document_id"), Column("topic_id"), _CONFIDENCE),
    "entities": (Column("document_id"), Column("entity_id", "string"), _CONFIDENCE),
}

LISTS = {"topics": "topic_id_list", "entities": "entity_id_list", "categories": "category_id_list"}
"""Kind of attribute -> the multi-hot feature it gives."""

CTR_MIN_ROWS = {
    "ad_id": 5,
    "source_id_promo": 10,
    "document_id_promo": 5,
    "publisher_id_promo": 10,
    "advertiser_id": 10,
    "campaign_id": 10,
}
"""Key -> train rows below which its click rate is given as 0."""

COUNT_KEYS = ("ad_id", "document_id_promo")
"""Keys whose row count is a feature."""

AGES = ("publish_time_days_since_published", "publish_time_promo_days_since_published")
SIMILARITY = "document_id_document_id_promo_sim_"
