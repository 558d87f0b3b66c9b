-- What the archiver keeps account of: how far history goes, and what has been moved to cold storage.

-- Everything that workers had reported by `through` is in delivery_attempts. One row, which the archiver writes about
-- once a second; without it nothing is known yet.
CREATE TABLE history_progress (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    through timestamptz NOT NULL
);

-- One row for each source that is moved to cold storage: a stream, or a table that is partitioned by day. Whoever holds
-- the lease works on the source; the epoch counts the holders, and nobody writes with an older one.
CREATE TABLE archive_sources (
    source      text PRIMARY KEY CHECK (char_length(source) BETWEEN 1 AND 200),
    epoch       bigint NOT NULL DEFAULT 0,
    holder      text,
    lease_until timestamptz NOT NULL DEFAULT '-infinity',
    -- Which stream of that name, or which day of the table: positions of another one mean nothing.
    incarnation text,
    -- Everything before this position is in cold storage, and was read back from there.
    next        bigint NOT NULL DEFAULT 1 CHECK (next > 0),
    -- The key of the last row that was moved, where positions count the rows of a table's day.
    after       uuid,
    -- When the last message that was archived came to the stream (the broker's time): another message of that number is
    -- one that the broker has given out again.
    last_at     timestamptz,
    -- Everything before this position has been removed from the stream.
    trimmed     bigint NOT NULL DEFAULT 1 CHECK (trimmed > 0 AND trimmed <= next)
);

-- Batches of a stream that are in cold storage and still in the stream.
CREATE TABLE archive_batches (
    source text NOT NULL REFERENCES archive_sources (source),
    -- The positions of its first and last message.
    first  bigint NOT NULL,
    last   bigint NOT NULL CHECK (last >= first),
    -- When the last message came to the stream (the broker's time).
    newest timestamptz NOT NULL,
    PRIMARY KEY (source, first)
);

-- Dead letters expire, whoever's they are.
CREATE INDEX delivery_states_dead_age ON delivery_states (changed_at) WHERE state = 'dead';

-- Set when the payload was erased: the body is empty then, and everything else is as it was.
ALTER TABLE events ADD COLUMN expunged_at timestamptz;

-- The schema of temporary tables last: functions of the owner must not find a caller's tables in it (see 00006).
SELECT set_config('search_path', current_setting('search_path') || ', pg_temp', true);
ALTER FUNCTION create_day_partition(text, date) SET search_path FROM CURRENT;

-- Removes one day of a table that is partitioned by day. A function of the owner, because only the owner may. If
-- `expected` is given, the day must have as many rows, counted while nobody can write to it; otherwise nothing happens, and
-- the answer is how many it has. NULL: it is gone, or was.
CREATE FUNCTION drop_day_partition(parent text, day date, expected bigint) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    name text := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
    found bigint;
BEGIN
    IF parent NOT IN ('events', 'delivery_attempts', 'occurrences', 'audit_records') THEN
        RAISE EXCEPTION 'table % is not partitioned by day', parent;
    END IF;
    IF day >= (now() AT TIME ZONE 'UTC')::date THEN
        RAISE EXCEPTION 'the day % is not over', day;
    END IF;
    -- The lock that creating takes too.
    PERFORM pg_advisory_xact_lock(hashtext(parent));
    IF to_regclass(name) IS NULL THEN
        RETURN NULL;
    END IF;
    -- Waiting long for the table's lock would hold up everybody behind us; better to try again later.
    PERFORM set_config('lock_timeout', '2s', true);
    IF expected IS NOT NULL THEN
        -- Nobody writes to it any more while it is counted; reading goes on.
        EXECUTE format('LOCK TABLE %I IN SHARE MODE', name);
        EXECUTE format('SELECT count(*) FROM %I', name) INTO found;
        IF found <> expected THEN
            RETURN found;
        END IF;
    END IF;
    EXECUTE format('DROP TABLE %I', name);
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION drop_day_partition(text, date, bigint) FROM PUBLIC;
