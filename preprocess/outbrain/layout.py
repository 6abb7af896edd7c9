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
GEO = ("geo_location", "geo_location_country", "geo_location_state")

FEB_2021_NAMES = {
    "document_id": "doc_event_id",
    "platform": "event_platform",
    "document_id_promo": "doc_id",
    "source_id": "doc_event_source_id",
    "publisher_id": "doc_event_publisher_id",
    "geo_location": "event_geo_location",
    "geo_location_country": "event_country",
    "geo_location_state": "event_country_state",
    "ad_id": "ad_id",
    "advertiser_id": "ad_advertiser",
    "source_id_promo": "doc_ad_source_id",
    "publisher_id_promo": "doc_ad_publisher_id",
    "campaign_id": "campaign_id",
    "publish_time_days_since_published": "doc_event_days_since_published_log_01scaled",
    "publish_time_promo_days_since_published": "doc_ad_days_since_published_log_01scaled",
    "document_id_document_id_promo_sim_categories": "doc_event_doc_ad_sim_categories",
    "document_id_document_id_promo_sim_topics": "doc_event_doc_ad_sim_topics",
    "document_id_document_id_promo_sim_entities": "doc_event_doc_ad_sim_entities",
    "document_id_promo_ctr": "pop_document_id",
    "publisher_id_promo_ctr": "pop_publisher_id",
    "source_id_promo_ctr": "pop_source_id",
    "ad_id_ctr": "pop_ad_id",
    "advertiser_id_ctr": "pop_advertiser_id",
    "campaign_id_ctr": "pop_campain_id",
    "document_id_promo_count": "doc_views_log_01scaled",
    "ad_id_count": "ad_views_log_01scaled",
    "clicked": "label",
    "display_id": "display_id",
}
"""Column of the Outbrain spec -> its name in the Feb-2021 release."""
