-- What the delivery path leaves in the database: retries that wait long, dead letters, history, and
-- the queue itself where Postgres is the backend.

-- A retry that waits longer than a few seconds leaves the queue and waits here.
CREATE TABLE parked_deliveries (
    delivery_id        uuid PRIMARY KEY,
    event_uid          uuid NOT NULL,
    organization_id    uuid NOT NULL,
    subscription_id    uuid NOT NULL,
    connection_id      uuid NOT NULL,
    connection_version bigint NOT NULL,
    -- attempts made so far
    attempts           integer NOT NULL CHECK (attempts >= 0),
    due_at             timestamptz NOT NULL,
    reason             text NOT NULL,
    lease_until        timestamptz NOT NULL DEFAULT '-infinity',
    parked_at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX parked_deliveries_due ON parked_deliveries (greatest(due_at, lease_until));
CREATE INDEX parked_deliveries_event ON parked_deliveries (event_uid);

CREATE TABLE dead_letters (
    delivery_id     uuid PRIMARY KEY,
    event_uid       uuid NOT NULL,
    organization_id uuid NOT NULL,
    subscription_id uuid NOT NULL,
    connection_id   uuid NOT NULL,
    attempts        integer NOT NULL,
    reason          text NOT NULL,
    -- the last answer, if there was one; the body is capped at 16 KiB
    last_status     integer,
    last_body       bytea,
    last_error      text,
    died_at         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX dead_letters_page ON dead_letters (organization_id, died_at, delivery_id);
CREATE INDEX dead_letters_event ON dead_letters (event_uid);

-- One row per finished attempt, written in bulk by the archiver from the receipt stream.
-- delivery_attempts lags behind the deliveries themselves by about a second.
CREATE TABLE delivery_attempts (
    delivery_id     uuid NOT NULL,
    -- 1 is the first attempt
    attempt         integer NOT NULL,
    event_uid       uuid NOT NULL,
    organization_id uuid NOT NULL,
    subscription_id uuid NOT NULL,
    connection_id   uuid NOT NULL,
    outcome         text NOT NULL,
    status          integer,
    error           text,
    at              timestamptz NOT NULL,
    duration_ms     integer NOT NULL,
    PRIMARY KEY (event_uid, delivery_id, attempt)
) PARTITION BY RANGE (event_uid);
CREATE TABLE delivery_attempts_default PARTITION OF delivery_attempts DEFAULT;

-- The delivery queue of the Postgres backend. A row leaves when its delivery is finished.
CREATE TABLE delivery_queue (
    delivery_id        uuid PRIMARY KEY,
    lane               smallint NOT NULL,
    event_uid          uuid NOT NULL,
    organization_id    uuid NOT NULL,
    subscription_id    uuid NOT NULL,
    connection_id      uuid NOT NULL,
    connection_version bigint NOT NULL,
    attempts           integer NOT NULL DEFAULT 0,
    -- The row may be claimed from this time on: its due time, or the end of the holder's lease.
    visible_at         timestamptz NOT NULL,
    -- Changes with each claim; a late answer of an earlier holder finds another token and changes nothing.
    lease_token        uuid,
    enqueued_at        timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70);
CREATE INDEX delivery_queue_visible ON delivery_queue (lane, visible_at);
