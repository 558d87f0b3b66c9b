-- What is swept of usage is found by the day.
CREATE INDEX organization_usage_day ON organization_usage (day);
