//! Rows as Parquet, and back.

use std::sync::Arc;

use bytes::Bytes;
use parquet::{
    basic::{Compression, ConvertedType, LogicalType, Repetition, TimeUnit, Type as Physical, ZstdLevel},
    data_type::{
        BoolType, ByteArray, ByteArrayType, DataType, FixedLenByteArray, FixedLenByteArrayType, Int32Type,
        Int64Type,
    },
    errors::{ParquetError, Result},
    file::{
        properties::{WriterProperties, WriterPropertiesPtr},
        reader::FileReader,
        serialized_reader::SerializedFileReader,
        writer::{SerializedColumnWriter, SerializedFileWriter},
    },
    record::{Field, reader::RowIter},
    schema::types::{ColumnPath, Type},
};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::dataset::{Column, Dataset, Kind, Row, Value, micros};

/// A row group ends after so many rows …
const GROUP_ROWS: usize = 50_000;

/// … or so many bytes in memory, so that a reader needs little of it.
const GROUP_BYTES: usize = 16 * 1024 * 1024;

/// The rows as a Parquet file.
pub(crate) fn encode(dataset: &Dataset, rows: &[Row]) -> Result<Bytes> {
    let fields =
        dataset.columns.iter().map(|column| field(column).map(Arc::new)).collect::<Result<Vec<_>>>()?;
    let schema = Arc::new(Type::group_type_builder(dataset.domain).with_fields(fields).build()?);
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties(dataset, rows.len())?)?;
    for group in groups(rows) {
        let mut columns = writer.next_row_group()?;
        for (index, column) in dataset.columns.iter().enumerate() {
            let mut target = columns.next_column()?.ok_or_else(|| missing(column.name))?;
            write_column(&mut target, group, index, column)?;
            target.close()?;
        }
        columns.close()?;
    }
    Ok(writer.into_inner()?.into())
}

fn missing(name: &str) -> ParquetError {
    ParquetError::General(format!("the schema has no column {name}"))
}

fn field(column: &Column) -> Result<Type> {
    let (physical, logical) = match column.kind {
        Kind::Uuid => (Physical::FIXED_LEN_BYTE_ARRAY, Some(LogicalType::Uuid)),
        Kind::Timestamp => (Physical::INT64, Some(LogicalType::timestamp(true, TimeUnit::MICROS))),
        Kind::Int => (Physical::INT32, None),
        Kind::Long => (Physical::INT64, None),
        Kind::Bool => (Physical::BOOLEAN, None),
        Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
        Kind::Json => (Physical::BYTE_ARRAY, Some(LogicalType::Json)),
        Kind::Bytes => (Physical::BYTE_ARRAY, None),
    };
    let repetition = if column.nullable { Repetition::OPTIONAL } else { Repetition::REQUIRED };
    Type::primitive_type_builder(column.name, physical)
        .with_repetition(repetition)
        .with_logical_type(logical)
        .with_length(if column.kind == Kind::Uuid { 16 } else { -1 })
        .build()
}

fn properties(dataset: &Dataset, rows: usize) -> Result<WriterPropertiesPtr> {
    let values = u64::try_from(rows.min(GROUP_ROWS)).unwrap_or(u64::MAX);
    let mut builder = WriterProperties::builder()
        .set_created_by("event-bus cold-storage".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?));
    for column in dataset.columns {
        let path = ColumnPath::from(column.name);
        // Ids are looked up one at a time; the organization is the same in the whole file.
        if column.kind == Kind::Uuid && column.name != dataset.organization {
            builder = builder
                .set_column_bloom_filter_enabled(path.clone(), true)
                .set_column_bloom_filter_max_ndv(path.clone(), values.max(1));
        }
        if column.kind == Kind::Bytes {
            builder = builder.set_column_dictionary_enabled(path, false);
        }
    }
    Ok(Arc::new(builder.build()))
}

/// The rows, cut into row groups.
fn groups(rows: &[Row]) -> impl Iterator<Item = &[Row]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fitting = rest
            .iter()
            .take(GROUP_ROWS)
            .take_while(|row| {
                let room = bytes < GROUP_BYTES;
                bytes += row_size(row);
                room
            })
            .count();
        let (group, after) = rest.split_at(fitting);
        rest = after;
        (!group.is_empty()).then_some(group)
    })
}

/// About as much memory as a row takes.
pub(crate) fn row_size(row: &Row) -> usize {
    size_of::<Row>() + row.iter().map(Value::size).sum::<usize>()
}

fn write_column(
    target: &mut SerializedColumnWriter<'_>,
    rows: &[Row],
    index: usize,
    column: &Column,
) -> Result<()> {
    let values = Values { rows, index, nullable: column.nullable };
    match column.kind {
        Kind::Uuid => values.write::<FixedLenByteArrayType>(target, |value| match value {
            Value::Uuid(uuid) => Some(FixedLenByteArray::from(uuid.as_bytes().to_vec())),
            _ => None,
        }),
        Kind::Timestamp | Kind::Long => values.write::<Int64Type>(target, |value| match value {
            Value::Timestamp(at) => Some(at.as_microsecond()),
            Value::Long(number) => Some(*number),
            _ => None,
        }),
        Kind::Int => values.write::<Int32Type>(target, |value| match value {
            Value::Int(number) => Some(*number),
            _ => None,
        }),
        Kind::Bool => values.write::<BoolType>(target, |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        }),
        Kind::Text | Kind::Json | Kind::Bytes => values.write::<ByteArrayType>(target, |value| match value {
            Value::Text(text) | Value::Json(text) => Some(ByteArray::from(text.as_str())),
            Value::Bytes(bytes) => Some(ByteArray::from(bytes.clone())),
            _ => None,
        }),
    }
}

/// One column of some rows.
struct Values<'a> {
    rows: &'a [Row],
    index: usize,
    nullable: bool,
}

impl Values<'_> {
    fn write<T: DataType>(
        &self,
        target: &mut SerializedColumnWriter<'_>,
        value: impl Fn(&Value) -> Option<T::T>,
    ) -> Result<()> {
        let mut values = Vec::with_capacity(self.rows.len());
        let mut levels = Vec::with_capacity(self.rows.len());
        for row in self.rows {
            let found = row.get(self.index).and_then(&value);
            levels.push(i16::from(found.is_some()));
            values.extend(found);
        }
        target.typed::<T>().write_batch(&values, self.nullable.then_some(&levels), None)?;
        Ok(())
    }
}

/// The rows of a file, one after the other. Its columns are its own: a file of an older version may have fewer.
pub(crate) struct Rows {
    pub(crate) columns: Arc<[String]>,
    kinds: Vec<Kind>,
    rows: RowIter<'static>,
}

impl Rows {
    /// Reads a file whose bytes are known to be as they were written.
    pub(crate) fn open(file: Bytes) -> Result<Self> {
        let reader = SerializedFileReader::new(file)?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let names = schema.columns().iter().map(|column| column.name().to_owned());
        let kinds = schema.columns().iter().map(|column| {
            let kind = match (column.physical_type(), column.converted_type()) {
                (Physical::FIXED_LEN_BYTE_ARRAY, _) if column.type_length() == 16 => Kind::Uuid,
                (Physical::INT64, ConvertedType::TIMESTAMP_MICROS) => Kind::Timestamp,
                (Physical::INT32, ConvertedType::NONE) => Kind::Int,
                (Physical::INT64, ConvertedType::NONE) => Kind::Long,
                (Physical::BOOLEAN, _) => Kind::Bool,
                (Physical::BYTE_ARRAY, ConvertedType::UTF8) => Kind::Text,
                (Physical::BYTE_ARRAY, ConvertedType::JSON) => Kind::Json,
                (Physical::BYTE_ARRAY, ConvertedType::NONE) => Kind::Bytes,
                (physical, _) => {
                    return Err(ParquetError::General(format!("{} is a {physical}", column.name())));
                }
            };
            Ok(kind)
        });
        let kinds = kinds.collect::<Result<_>>()?;
        Ok(Self { columns: names.collect(), kinds, rows: RowIter::from_file_into(Box::new(reader)) })
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = match self.rows.next()? {
            Ok(row) => row.into_columns(),
            Err(error) => return Some(Err(error)),
        };
        Some(row.into_iter().zip(&self.kinds).map(|((_, field), kind)| value(field, *kind)).collect())
    }
}

fn value(field: Field, kind: Kind) -> Result<Value> {
    Ok(match (field, kind) {
        (Field::Null, _) => Value::Null,
        (Field::Bytes(bytes), Kind::Uuid) => {
            let uuid = Uuid::from_slice(bytes.data());
            Value::Uuid(uuid.map_err(|cause| ParquetError::General(cause.to_string()))?)
        }
        (Field::TimestampMicros(at), _) => Value::Timestamp(micros(at).map_err(ParquetError::General)?),
        (Field::Int(number), _) => Value::Int(number),
        (Field::Long(number), _) => Value::Long(number),
        (Field::Bool(truth), _) => Value::Bool(truth),
        (Field::Str(text), Kind::Json) => Value::Json(text),
        (Field::Str(text), _) => Value::Text(text),
        (Field::Bytes(bytes), _) => Value::Bytes(Bytes::copy_from_slice(bytes.data())),
        (field, kind) => return Err(ParquetError::General(format!("{field} is no {kind:?}"))),
    })
}

/// A digest of rows that does not depend on how they are written.
#[derive(Default)]
pub(crate) struct RowsDigest {
    hash: Sha256,
    pub(crate) rows: u64,
}

impl RowsDigest {
    pub(crate) fn add(&mut self, row: &Row) {
        self.rows += 1;
        for value in row {
            match value {
                Value::Null => self.part(0, &[]),
                Value::Uuid(uuid) => self.part(1, uuid.as_bytes()),
                Value::Timestamp(at) => self.part(2, &at.as_microsecond().to_be_bytes()),
                Value::Int(number) => self.part(3, &number.to_be_bytes()),
                Value::Long(number) => self.part(4, &number.to_be_bytes()),
                Value::Bool(truth) => self.part(5, &[u8::from(*truth)]),
                Value::Text(text) => self.part(6, text.as_bytes()),
                Value::Json(text) => self.part(7, text.as_bytes()),
                Value::Bytes(bytes) => self.part(8, bytes),
            }
        }
    }

    fn part(&mut self, kind: u8, bytes: &[u8]) {
        self.hash.update([kind]);
        self.hash.update((bytes.len() as u64).to_be_bytes());
        self.hash.update(bytes);
    }

    pub(crate) fn finish(self) -> String {
        hexadecimal(&self.hash.finalize())
    }
}

/// The SHA-256 of some bytes, hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
