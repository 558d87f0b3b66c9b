-- Durable jobs that bring deliveries back, or discard them: of an event, of a subscription since a time, of dead
-- letters. A job never touches the queue. It makes rows of delivery_states wait, due at once; whoever returns
-- parked retries returns these too.
--
-- A job advances by chunks. A chunk's rows, its counters and its cursor are one transaction that holds the job's
-- row, so that a kill at any point loses nothing and repeats nothing.
CREATE TABLE replays (
    id              uuid PRIMARY KEY,
    organization_id uuid NOT NULL REFERENCES organizations (id),
    -- The only connection whose deliveries it touches; none for all.
    connection_id   uuid,
    -- What is to be replayed or discarded; see Selection in bus-core.
    selection       jsonb NOT NULL,
    per_second      integer NOT NULL CHECK (per_second BETWEEN 1 AND 10000),
    -- The request's Idempotency-Key, and the SHA-256 of its path and body.
    idempotency_key text,
    fingerprint     bytea,
    state           text NOT NULL DEFAULT 'pending'
        CHECK (state IN ('pending', 'running', 'done', 'cancelled', 'failed')),
    failure         text,
    looked          bigint NOT NULL DEFAULT 0,
    replayed        bigint NOT NULL DEFAULT 0,
    -- What was looked at last: its id, and for what is ordered by time its time.
    cursor_id       uuid,
    cursor_at       timestamptz,
    -- The next chunk is due at this time (database time); this is what keeps the rate.
    next_at         timestamptz NOT NULL DEFAULT now(),
    created_at      timestamptz NOT NULL DEFAULT now(),
    finished_at     timestamptz,
    CHECK ((finished_at IS NULL) = (state IN ('pending', 'running'))),
    CHECK ((failure IS NOT NULL) = (state = 'failed')),
    CHECK ((idempotency_key IS NULL) = (fingerprint IS NULL))
) WITH (fillfactor = 70);
CREATE INDEX replays_open ON replays (next_at) WHERE state IN ('pending', 'running');
CREATE INDEX replays_page ON replays (organization_id, id);
CREATE UNIQUE INDEX replays_key ON replays (organization_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- Dead letters are listed and replayed by connection and by subscription too.
CREATE INDEX delivery_states_dead_connection
    ON delivery_states (organization_id, connection_id, changed_at DESC, delivery_id DESC) WHERE state = 'dead';
CREATE INDEX delivery_states_dead_subscription
    ON delivery_states (organization_id, subscription_id, changed_at DESC, delivery_id DESC) WHERE state = 'dead';
