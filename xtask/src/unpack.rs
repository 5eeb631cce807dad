//! Taking the ELF file out of a compressed kernel.

use anyhow::{Context, Result, bail, ensure};
use std::io::Read;

/// Where the set-up header of the Linux boot protocol keeps its magic word, and that word.
const MAGIC: (usize, &[u8]) = (0x202, b"HdrS");

/// The ELF file inside `bzimage`; an ELF file is returned as it is.
pub(crate) fn kernel(bzimage: &[u8]) -> Result<Vec<u8>> {
    if bzimage.starts_with(b"\x7fELF") {
        return Ok(bzimage.to_vec());
    }
    ensure!(
        bzimage.get(MAGIC.0..MAGIC.0 + MAGIC.1.len()) == Some(MAGIC.1),
        "neither a bzImage nor an ELF file"
    );
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage
            .get(at..at + 4)
            .context("the set-up header is cut short")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let sectors = usize::from(
        *bzimage
            .get(0x1f1)
            .context("the set-up header is cut short")?,
    );
    let start = (sectors.max(if sectors == 0 { 4 } else { 1 }) + 1) * 512 + word(0x248)?;
    let payload = bzimage
        .get(start..start + word(0x24c)?)
        .context("the file is shorter than its payload")?;
    // The last word of the payload is the unpacked size.
    let mut out = Vec::new();
    if payload.starts_with(b"\xfd7zXZ\0") {
        lzma_rust2::XzReader::new(payload, false)
            .read_to_end(&mut out)
            .context("the compressed payload is damaged")?;
    } else {
        bail!(
            "the payload starts with {:02x?}, which is no compression we know",
            payload.get(..4)
        );
    }
    Ok(out)
}
