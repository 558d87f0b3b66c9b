-- One Postgres role per binary, each with what it needs and no more; `bus_all` is for the process of every
-- role. Run by the schema's owner after every migration; repeating it is harmless. Passwords are set apart from
-- this file.

DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY ARRAY ['bus_publisher', 'bus_worker', 'bus_scheduler', 'bus_archiver', 'bus_all'] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I LOGIN', role);
        EXCEPTION
            -- unique_violation: another session creates it at this moment
            WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END LOOP;
END
$$;

GRANT bus_publisher, bus_worker, bus_scheduler, bus_archiver TO bus_all;

GRANT SELECT ON _sqlx_migrations TO bus_publisher, bus_worker, bus_scheduler, bus_archiver;

GRANT SELECT, INSERT, UPDATE ON organizations, api_keys, connections, subscriptions TO bus_publisher;
GRANT SELECT, INSERT, UPDATE ON organization_usage TO bus_publisher;
GRANT SELECT, INSERT ON events TO bus_publisher;
GRANT SELECT, INSERT, UPDATE ON event_keys, outbox TO bus_publisher;
GRANT SELECT, INSERT, UPDATE ON delivery_queue TO bus_publisher;
GRANT SELECT ON delivery_attempts, history_progress TO bus_publisher;
-- Acknowledgements and cancellations.
GRANT SELECT, INSERT, UPDATE ON delivery_states TO bus_publisher;
GRANT DELETE ON delivery_queue TO bus_publisher;
GRANT SELECT, INSERT, UPDATE, DELETE ON replays, brokers TO bus_publisher;
GRANT SELECT, INSERT, UPDATE ON scheduled_events, schedules TO bus_publisher;
GRANT EXECUTE ON FUNCTION announce_connection(uuid, uuid, text, json) TO bus_publisher;
GRANT SELECT ON occurrences TO bus_publisher;
GRANT SELECT, INSERT, DELETE ON erasures TO bus_publisher;
-- Records are written and read, never changed.
GRANT SELECT, INSERT ON audit_records TO bus_publisher;

GRANT SELECT ON connections, subscriptions, events TO bus_worker;
GRANT SELECT (id, lane) ON organizations TO bus_worker;
GRANT EXECUTE ON FUNCTION disable_connection(uuid, uuid, bigint, text), note_working(uuid, uuid),
    note_failing(uuid, uuid, bigint, double precision) TO bus_worker;
GRANT SELECT, INSERT, UPDATE ON delivery_states TO bus_worker;
GRANT SELECT, INSERT ON delivery_attempts TO bus_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON delivery_queue TO bus_worker;

GRANT SELECT ON events TO bus_scheduler;
GRANT SELECT, INSERT, UPDATE ON delivery_states TO bus_scheduler;
GRANT SELECT, INSERT, UPDATE ON delivery_queue TO bus_scheduler;
-- Replays match again; nothing of that needs a connection's secret.
GRANT SELECT, UPDATE ON replays TO bus_scheduler;
GRANT SELECT ON subscriptions TO bus_scheduler;
GRANT SELECT (id, version, lane) ON organizations TO bus_scheduler;
GRANT SELECT (id, version, enabled, deleted_at) ON connections TO bus_scheduler;
-- What is due becomes events, with their fan-out.
GRANT SELECT, UPDATE, DELETE ON scheduled_events TO bus_scheduler;
GRANT SELECT, UPDATE ON schedules TO bus_scheduler;
GRANT SELECT, INSERT, UPDATE ON occurrences, outbox TO bus_scheduler;
GRANT INSERT ON events TO bus_scheduler;
GRANT SELECT ON delivery_attempts TO bus_scheduler;

GRANT INSERT ON delivery_attempts TO bus_archiver;
-- UPDATE is what SELECT … FOR UPDATE asks for.
GRANT SELECT, UPDATE, DELETE ON outbox, event_keys, delivery_states, scheduled_events, schedules TO bus_archiver;
GRANT SELECT, INSERT, UPDATE ON history_progress, archive_sources TO bus_archiver;
GRANT SELECT, INSERT, DELETE ON archive_batches TO bus_archiver;
GRANT SELECT, DELETE ON organization_usage TO bus_archiver;
-- What expires is moved to cold storage first. Days go whole, by the function; rows of days without a partition one by one.
GRANT SELECT, DELETE ON events, delivery_attempts, occurrences TO bus_archiver;
GRANT SELECT, UPDATE (relayed_at) ON audit_records TO bus_archiver;
-- Erasures empty payloads, and leave a record when they are done.
GRANT UPDATE (body, expunged_at) ON events TO bus_archiver;
GRANT SELECT, UPDATE ON erasures TO bus_archiver;
GRANT INSERT ON audit_records TO bus_archiver;
GRANT EXECUTE ON FUNCTION create_day_partition(text, date), drop_day_partition(text, date, bigint) TO bus_archiver;
