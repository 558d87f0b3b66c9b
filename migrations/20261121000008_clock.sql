-- What the clock drives besides retries: events that are due later, and events that recur.

-- Events with a deliverAt. They wait here, whole, and move into `events` in the transaction that matches them, at
-- their due time and never before. The uid is a UUIDv7 of the due time, so that the event then lies in that
-- day's partition, and its retention begins when it is delivered.
CREATE TABLE scheduled_events (
    uid             uuid PRIMARY KEY,
    organization_id uuid NOT NULL,
    id              text NOT NULL,
    source          text NOT NULL,
    type            text NOT NULL,
    subject         text,
    time            timestamptz NOT NULL,
    publisher       uuid,
    received_at     timestamptz NOT NULL DEFAULT now(),
    due_at          timestamptz NOT NULL,
    -- The schedule whose occurrence this is, for one that was triggered by hand.
    schedule_id     uuid,
    -- It is not to be published any more; the row goes some time later.
    cancelled_at    timestamptz,
    body            bytea NOT NULL
);
CREATE INDEX scheduled_events_due ON scheduled_events (due_at, uid) WHERE cancelled_at IS NULL;
CREATE INDEX scheduled_events_page ON scheduled_events (organization_id, uid);
CREATE INDEX scheduled_events_id ON scheduled_events (organization_id, id);
CREATE INDEX scheduled_events_over ON scheduled_events (cancelled_at) WHERE cancelled_at IS NOT NULL;
CREATE INDEX scheduled_events_triggered ON scheduled_events (schedule_id) WHERE schedule_id IS NOT NULL;

-- Events that recur. Every tick is accounted for: `next_tick` is the first one without a row in `occurrences`, and
-- moves only in the transaction that writes those rows.
CREATE TABLE schedules (
    id              uuid PRIMARY KEY,
    organization_id uuid NOT NULL REFERENCES organizations (id),
    -- The connection that publishes, if the key was bound to one.
    publisher       uuid,
    type            text NOT NULL,
    source          text NOT NULL,
    -- Six fields or five, normalised.
    cron            text NOT NULL,
    -- An IANA name.
    timezone        text NOT NULL,
    -- SHA-256 of type, source, cron and timezone, each after its length in bytes: together they may be longer than an
    -- index row may be.
    identity        bytea NOT NULL,
    -- The CloudEvent that each occurrence is made from, in the JSON event format; each has an id and time of its own.
    template        bytea NOT NULL,
    starts_at       timestamptz,
    ends_at         timestamptz,
    jitter_ms       integer NOT NULL CHECK (jitter_ms >= 0),
    missed          text NOT NULL CHECK (missed IN ('skip', 'fire_once', 'catch_up')),
    catch_up_limit  integer NOT NULL CHECK (catch_up_limit > 0),
    overlap         text NOT NULL CHECK (overlap IN ('allow', 'skip')),
    state           text NOT NULL CHECK (state IN ('active', 'paused', 'ended', 'cancelled')),
    -- Which time zone data next_tick was computed with.
    tz_version      text NOT NULL,
    next_tick       timestamptz,
    -- next_tick and its jitter
    due_at          timestamptz,
    -- After an outage: late ticks before this one are to be fired all the same.
    catch_up_until  timestamptz,
    -- When it was resumed last: ticks up to then that nobody came to are skipped as paused.
    resumed_at      timestamptz,
    -- The latest occurrence that was published.
    last_event      uuid,
    -- The latest occurrence if it was skipped: more of the kind may be added to that row.
    open_skip       uuid,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    -- One that was cancelled may have ticks that were due by then, and are still to be noted.
    CHECK (next_tick IS NOT NULL OR state IN ('ended', 'cancelled')),
    CHECK ((next_tick IS NULL) = (due_at IS NULL))
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX schedules_identity ON schedules (organization_id, identity) WHERE state IN ('active', 'paused');
CREATE INDEX schedules_due ON schedules (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX schedules_page ON schedules (organization_id, id);
CREATE INDEX schedules_over ON schedules (updated_at) WHERE state IN ('ended', 'cancelled');

-- What became of the ticks of schedules: one row for each that was fired, and one for each run of skipped ones.
-- The uid is derived from schedule and tick, so that no tick has two rows; it is the event's uid for one that was fired.
CREATE TABLE occurrences (
    uid             uuid NOT NULL,
    schedule_id     uuid NOT NULL,
    organization_id uuid NOT NULL,
    state           text NOT NULL CHECK (state IN ('fired', 'skipped')),
    -- why it was skipped
    reason          text,
    -- It was triggered by hand and stands for no tick.
    manual          boolean NOT NULL DEFAULT false,
    -- The first and the last tick of the row, and how many they are.
    tick            timestamptz NOT NULL,
    last_tick       timestamptz NOT NULL,
    ticks           bigint NOT NULL CHECK (ticks > 0),
    -- When it was fired or skipped.
    at              timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (uid),
    CHECK ((state = 'skipped') = (reason IS NOT NULL)),
    CHECK (state <> 'fired' OR ticks = 1)
) PARTITION BY RANGE (uid);
CREATE TABLE occurrences_default PARTITION OF occurrences DEFAULT;
CREATE INDEX occurrences_schedule ON occurrences (schedule_id, uid);

-- As before, with one table more.
CREATE OR REPLACE FUNCTION create_day_partition(parent text, day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    name text := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
BEGIN
    IF parent NOT IN ('events', 'delivery_attempts', 'occurrences') THEN
        RAISE EXCEPTION 'table % is not partitioned by day', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext(parent));
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                   name, parent, uuid_floor(day), uuid_floor(day + 1));
    RETURN true;
END
$$;

SELECT create_day_partition('occurrences', (now() AT TIME ZONE 'UTC')::date + ahead) FROM generate_series(0, 7) AS ahead;
