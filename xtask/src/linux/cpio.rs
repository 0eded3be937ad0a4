//! Writing `newc` archives: the initial RAM disk, and the bundle of kernel and RAM disk that the hypervisor is given.

/// Kinds of files, as in a mode.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that grows.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder.
    pub(super) fn folder(self, path: &str) -> Self {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file that may be executed.
    pub(super) fn program(self, path: &str, data: &[u8]) -> Self {
        self.entry(path, REGULAR | 0o755, (0, 0), data)
    }

    /// Adds a file.
    pub(super) fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(path, REGULAR | 0o644, (0, 0), data)
    }

    /// Adds a character device.
    pub(super) fn device(self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// The whole archive.
    pub(super) fn finish(self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]).bytes
    }

    /// Inode, mode, owner and group, links, time, size, device, device number, bytes of the name, checksum.
    fn entry(mut self, path: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]) -> Self {
        self.entries += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let numbers = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name,
            0,
        ];
        self.bytes.extend(b"070701");
        for number in numbers {
            self.bytes.extend(format!("{number:08x}").bytes());
        }
        self.bytes.extend(path.bytes().chain([0]));
        self.align();
        self.bytes.extend(data);
        self.align();
        self
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn names_and_data_end_at_multiples_of_four() {
        let archive = Archive::default()
            .folder("bin")
            .program("bin/a", b"12345")
            .finish();
        let headers = archive.windows(6).enumerate();
        let at: Vec<usize> = headers
            .filter(|(_, window)| window == b"070701")
            .map(|(at, _)| at)
            .collect();
        // 110 bytes of header, the name with its zero, the data.
        assert_eq!(at, [0, 116, 116 + 116 + 8]);
        assert_eq!(archive.len(), 240 + 124);
        assert_eq!(&archive[14..22], b"000041ed");
    }
}
