//! TensorFlow's records: length, its check sum, the data, their check sum.
//!
//! | bytes | |
//! |---|---|
//! | 8 | n, little endian |
//! | 4 | masked CRC-32C of those eight |
//! | n | the data |
//! | 4 | masked CRC-32C of the data |
//!
//! The CRC is Castagnoli's (polynomial 0x1EDC6F41, reflected); masked is ((crc ≫ 15) | (crc ≪ 17)) + 0xA282EAD8.

/// Returns a record of `data`.
pub(super) fn encode(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked(data).to_le_bytes());
    record
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, byte| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)])
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// Returns the data of every record, or the problem with the first invalid one.
#[cfg(test)]
pub(super) fn decode(mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or("cut in a length")?;
        let (sum, rest) = rest.split_first_chunk::<4>().ok_or("cut in a check sum")?;
        if u32::from_le_bytes(*sum) != masked(length) {
            return Err(format!("record {}: the length is damaged", records.len()));
        }
        let (data, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).ok_or("cut in the data")?;
        let (sum, rest) = rest.split_first_chunk::<4>().ok_or("cut in a check sum")?;
        if u32::from_le_bytes(*sum) != masked(data) {
            return Err(format!("record {}: the data are damaged", records.len()));
        }
        records.push(data.to_vec());
        bytes = rest;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_sum_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xff; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn damage_is_found() {
        let mut bytes = [encode(b"one"), encode(b"")].concat();
        assert_eq!(decode(&bytes).unwrap(), [b"one".to_vec(), Vec::new()]);
        assert_eq!(decode(&bytes[..bytes.len() - 1]).unwrap_err(), "cut in a check sum");
        bytes[13] ^= 1;
        assert_eq!(decode(&bytes).unwrap_err(), "record 0: the data are damaged");
        bytes[0] ^= 1;
        assert_eq!(decode(&bytes).unwrap_err(), "record 0: the length is damaged");
    }
}
