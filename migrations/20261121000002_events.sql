-- Events, their deduplication, and the outbox.

-- The body is the CloudEvent in the JSON event format, byte for byte as it is delivered; the other
-- columns are what history is queried by. jsonb would lose the payload's own number and key spelling.
-- Rows expire by dropping partitions, so the table is partitioned by the UUIDv7 key (time-ordered).
CREATE TABLE events (
    uid             uuid NOT NULL,
    organization_id uuid NOT NULL,
    id              text NOT NULL,
    source          text NOT NULL,
    type            text NOT NULL,
    subject         text,
    time            timestamptz NOT NULL,
    publisher       uuid,
    received_at     timestamptz NOT NULL DEFAULT now(),
    -- The subscriptions that matched when the event was published. With uid they determine the
    -- deliveries and their ids; nothing else has to be stored for the fan-out.
    subscriptions   uuid[] NOT NULL DEFAULT '{}',
    body            bytea NOT NULL,
    PRIMARY KEY (uid)
) PARTITION BY RANGE (uid);
CREATE TABLE events_default PARTITION OF events DEFAULT;
CREATE INDEX events_organization ON events (organization_id, uid);
CREATE INDEX events_type ON events (organization_id, type, uid);
CREATE INDEX events_id ON events (organization_id, id);

-- (source, id) pairs and idempotency keys within their window. Inserted in the events' own
-- transaction: of two concurrent publishers of one key, the second waits for the first's commit.
CREATE TABLE event_keys (
    organization_id uuid NOT NULL,
    -- For an event 'e' and the hexadecimal SHA-256 of source and id, each after its length in bytes (8 bytes,
    -- big-endian): the two themselves may be longer than an index row may be. For an Idempotency-Key 'i' and
    -- the key, which has at most 255 bytes.
    key             text NOT NULL,
    event_uids      uuid[] NOT NULL,
    -- SHA-256 of the request body; set for an Idempotency-Key only
    fingerprint     bytea,
    expires_at      timestamptz NOT NULL,
    PRIMARY KEY (organization_id, key)
);
CREATE INDEX event_keys_expiry ON event_keys (expires_at);

-- One row per publish transaction that has something to fan out. finished_at is set when the queue
-- has acknowledged every delivery; the row is kept for longer than the broker's sync interval.
CREATE TABLE outbox (
    id          uuid PRIMARY KEY,
    event_uids  uuid[] NOT NULL,
    -- Whoever may work on the row holds it until this time (database time).
    lease_until timestamptz NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
) WITH (fillfactor = 70);
CREATE INDEX outbox_open ON outbox (lease_until) WHERE finished_at IS NULL;
CREATE INDEX outbox_finished ON outbox (finished_at) WHERE finished_at IS NOT NULL;
