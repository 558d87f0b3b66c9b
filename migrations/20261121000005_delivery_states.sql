-- One table for every delivery that has left the straight path, instead of one per state: a delivery is in
-- one state at a time because it has one row, and every transition is one guarded upsert of that row.
--
--   waiting    for its next try, at due_at
--   queued     back in the queue, by a retry or a replay
--   delivered  after it was queued again; history says so for all others
--   dead       given up; reason says why
--   acked      the subscriber says that it has it
--   cancelled  it is not to be delivered
--
-- Of two writers the one with the higher turn wins; acked and cancelled win over every late result.
CREATE TABLE delivery_states (
    delivery_id        uuid PRIMARY KEY,
    event_uid          uuid NOT NULL,
    organization_id    uuid NOT NULL,
    subscription_id    uuid NOT NULL,
    connection_id      uuid NOT NULL,
    connection_version bigint NOT NULL,
    state              text NOT NULL
        CHECK (state IN ('waiting', 'queued', 'delivered', 'dead', 'acked', 'cancelled')),
    -- Which entry into the queue this is about. A retry adds one; a replay begins at the time, milliseconds.
    turn               bigint NOT NULL CHECK (turn >= 0),
    -- failed attempts so far
    attempts           integer NOT NULL CHECK (attempts >= 0),
    -- when the delivery's lifetime began
    since              timestamptz NOT NULL,
    due_at             timestamptz,
    -- Whoever returns the delivery to the queue holds it until this time (database time).
    lease_until        timestamptz NOT NULL DEFAULT '-infinity',
    -- why it waits, or died
    reason             text,
    -- the last answer, if there was one; the body is capped at 16 KiB
    last_status        integer,
    last_body          bytea,
    last_error         text,
    last_attempt_at    timestamptz,
    last_duration_ms   integer,
    changed_at         timestamptz NOT NULL DEFAULT now(),
    CHECK ((state = 'waiting') = (due_at IS NOT NULL)),
    CHECK (state <> 'dead' OR reason IS NOT NULL)
) WITH (fillfactor = 80);
CREATE INDEX delivery_states_due ON delivery_states (greatest(due_at, lease_until)) WHERE state = 'waiting';
CREATE INDEX delivery_states_event ON delivery_states (event_uid);
CREATE INDEX delivery_states_dead ON delivery_states (organization_id, changed_at DESC, delivery_id DESC)
    WHERE state = 'dead';
CREATE INDEX delivery_states_closed ON delivery_states (changed_at) WHERE state IN ('acked', 'cancelled');
CREATE INDEX delivery_states_over ON delivery_states (changed_at)
    WHERE state IN ('queued', 'delivered', 'acked', 'cancelled');

INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                             connection_version, state, turn, attempts, since, due_at, reason)
SELECT delivery_id, event_uid, organization_id, subscription_id, connection_id, connection_version, 'waiting',
       attempts, attempts, parked_at, due_at, reason
FROM parked_deliveries;

INSERT INTO delivery_states (delivery_id, event_uid, organization_id, subscription_id, connection_id,
                             connection_version, state, turn, attempts, since, reason, last_status, last_body,
                             last_error, changed_at)
SELECT delivery_id, event_uid, organization_id, subscription_id, connection_id, 0, 'dead', attempts, attempts,
       died_at, reason, last_status, last_body, last_error, died_at
FROM dead_letters
ON CONFLICT (delivery_id) DO NOTHING;

DROP TABLE parked_deliveries, dead_letters;

-- The queue of the Postgres backend: what a delivery has behind it, how often it was handed out in this turn,
-- and a position, so that what went in together comes out in order.
ALTER TABLE delivery_queue
    ADD COLUMN turn bigint NOT NULL DEFAULT 0,
    ADD COLUMN since timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN handed_out integer NOT NULL DEFAULT 0,
    ADD COLUMN position bigint GENERATED ALWAYS AS IDENTITY;
DROP INDEX delivery_queue_visible;
CREATE INDEX delivery_queue_visible ON delivery_queue (lane, visible_at, position);

-- Two attempts may bear one number: a deferral counts none, and after a crash an attempt is repeated. What
-- tells them apart is when they began.
ALTER TABLE delivery_attempts
    ADD COLUMN turn bigint NOT NULL DEFAULT 0,
    DROP CONSTRAINT delivery_attempts_pkey,
    ADD PRIMARY KEY (event_uid, delivery_id, at, attempt);
