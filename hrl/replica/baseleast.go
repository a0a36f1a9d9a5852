package replica

// baseLeast is how many bytes the base of a disk has at the least: those of the
// point that it is at, or of one to which a fold may have begun to bring it.
func (s *state) baseLeast(disk string) int64 {
	if s.Base.IsZero() {
		return 0
	}
	least := int64(-1)
	for i := 0; i <= max(s.oldest(), 0); i++ {
		if d := s.Points[i].disk(disk); d == nil {
			least = 0
		} else if least < 0 || d.Size < least {
			least = d.Size
		}
	}
	return least
}
