-- What connections and subscriptions say about how deliveries are made, and how a worker disables a
-- connection whose endpoint is gone.

ALTER TABLE connections
    -- Answers with one of these HTTP statuses are final: the delivery is dead at once.
    ADD COLUMN final_statuses smallint[] NOT NULL DEFAULT '{}' CHECK (
        cardinality(final_statuses) <= 50 AND 300 <= ALL (final_statuses) AND 599 >= ALL (final_statuses)
    );

-- A change of these counts up the connection's version, by which workers know that theirs are old.
ALTER TABLE subscriptions
    -- {maxAttempts?, baseMs?, factor?, capMs?, jitter?} or {delaysMs, jitter?}; NULL for the configured policy
    ADD COLUMN retry_policy jsonb CHECK (jsonb_typeof(retry_policy) = 'object'),
    -- {maxEvents, maxWaitMs}; NULL for one event per call
    ADD COLUMN batch jsonb CHECK (jsonb_typeof(batch) = 'object');
-- What a worker reads with a connection. Deleted ones too: their deliveries may still be under way.
CREATE INDEX subscriptions_rules ON subscriptions (connection_id)
    WHERE retry_policy IS NOT NULL OR batch IS NOT NULL;

-- The functions below run as the owner. Unless it is named, the schema of temporary tables is searched
-- first, and in it a caller could put tables, with triggers, of the names that the functions use.
SELECT set_config('search_path', current_setting('search_path') || ', pg_temp', true);
ALTER FUNCTION create_day_partition(text, date) SET search_path FROM CURRENT;

-- Disables a connection whose endpoint says that it is gone, unless it was changed since the attempt that
-- was told so: a new URL must not pay for the old one. A function of the owner, because a worker may change
-- nothing else of a connection.
CREATE FUNCTION disable_connection(of_organization uuid, connection uuid, attempted_version bigint, why text)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
BEGIN
    -- First the lock that every change of a connection takes first, so that no two wait for each other.
    PERFORM 1 FROM organizations WHERE id = of_organization FOR NO KEY UPDATE;
    UPDATE connections
       SET enabled = false, disabled_reason = why, version = version + 1, updated_at = now()
     WHERE id = connection AND organization_id = of_organization AND version = attempted_version
       AND enabled AND deleted_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- What is published from now on is not matched for it (invariant I2).
    UPDATE organizations SET version = version + 1 WHERE id = of_organization;
    RETURN true;
END
$$;
REVOKE ALL ON FUNCTION disable_connection(uuid, uuid, bigint, text) FROM PUBLIC;
